"""Turn stored rows into tables; nothing here computes a result."""

from bitquorum.report.bench import bench_csv, bench_files, bench_table, bench_tables
from bitquorum.report.benchmark import benchmark_table
from bitquorum.report.certify import certificate_table
from bitquorum.report.compare import difference_table
from bitquorum.report.detect import detection_table, detectors, rejection_table, rejections
from bitquorum.report.ladder import bracket, ladder_seconds, rungs, verdicts
from bitquorum.report.museum import museum_table, peer_seconds, peer_table
from bitquorum.report.page import write_figures, write_page
from bitquorum.report.plane import correlation_table, plane_table, profiles
from bitquorum.report.tables import Table, comparison, environments, epsilon_label

__all__ = [
    "Table",
    "bench_csv",
    "bench_files",
    "bench_table",
    "bench_tables",
    "benchmark_table",
    "bracket",
    "certificate_table",
    "comparison",
    "correlation_table",
    "detection_table",
    "detectors",
    "difference_table",
    "environments",
    "epsilon_label",
    "ladder_seconds",
    "museum_table",
    "peer_seconds",
    "peer_table",
    "plane_table",
    "profiles",
    "rejection_table",
    "rejections",
    "rungs",
    "verdicts",
    "write_figures",
    "write_page",
]
