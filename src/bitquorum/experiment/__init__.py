"""Run experiments into the store: build, train, attack; every part resumes where a kill left it."""

from bitquorum.experiment.certify import attacked_epsilons, ceilings, certificates, certify_run
from bitquorum.experiment.compare import compare_run, differences, publish_run
from bitquorum.experiment.detect import detect_run, last_attack
from bitquorum.experiment.ladder import climb_run, ladder_rows, ladder_times, ladders, usual_epsilons, verdicts
from bitquorum.experiment.plane import correlations_of, plane_run
from bitquorum.experiment.runs import (
    build,
    create,
    ensembles,
    evaluate,
    evaluate_arms,
    experiment_of,
    progress_of,
    restore_ensemble,
    results,
    run,
    train,
    train_arms,
    training_images,
)
from bitquorum.experiment.threats import evaluated_images

__all__ = [
    "attacked_epsilons",
    "build",
    "ceilings",
    "certificates",
    "certify_run",
    "climb_run",
    "compare_run",
    "correlations_of",
    "create",
    "detect_run",
    "differences",
    "ensembles",
    "evaluate",
    "evaluate_arms",
    "evaluated_images",
    "experiment_of",
    "ladder_rows",
    "ladder_times",
    "ladders",
    "last_attack",
    "plane_run",
    "progress_of",
    "publish_run",
    "restore_ensemble",
    "results",
    "run",
    "train",
    "train_arms",
    "training_images",
    "usual_epsilons",
    "verdicts",
]
