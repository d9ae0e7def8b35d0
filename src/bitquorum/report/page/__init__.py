"""Show runs as one HTML page that opens without a network, and its plots as files for papers.

| file | holds |
|---|---|
| `collect` | what the store holds of a run |
| `figures`, `look` | a plot as rows, and how its series look |
| `curves`, `planes`, `detectors` | the plots |
| `examples` | example images and votes |
| `sections` | headings, tables and texts |
| `paper`, `sheets` | a plot as PNG and SVG, and as CSV and Parquet |
| `write` | the page; `page.js` draws its plots, `page.css` is its style |
"""

from bitquorum.report.page.collect import RunView, collect
from bitquorum.report.page.figures import Figure
from bitquorum.report.page.write import write_figures, write_page

__all__ = ["Figure", "RunView", "collect", "write_figures", "write_page"]
