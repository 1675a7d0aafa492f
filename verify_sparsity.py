"""Report, matrix by matrix, whether saved weights have a sparsity pattern. Matrices are read one at a time.

    python verify_sparsity.py exported_model                       # a safetensors file or folder
    python verify_sparsity.py saved_models/pts_modelopt_state.pth  # a modelopt state
    python verify_sparsity.py exported_model --require 2:4         # exit code 1 unless every matrix is 2:4

A state is compared with the pattern that it was pruned to, everything else with that of --require, by default 2:4.
Columns: zeros is the fraction of zeros; pattern says whether the matrix has at least the pattern's zeros; -0.0
counts negative zeros, which some tools take for values.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity.errors import UserError, few, reported_as
from sparsity.files import prepare_output_dir, save_json
from sparsity.pattern import Pattern
from utils import Parser, run_cli

if TYPE_CHECKING:
    from sparsity.inspection import MatrixReport


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("path", help="model folder, .safetensors file or modelopt state")
    parser.add_argument("--require", metavar="PATTERN", help="fail unless every listed matrix has it, e.g. 2:4")
    parser.add_argument(
        "--exclude",
        metavar="REGEX",
        help="weights of a safetensors folder to skip (by default embeddings, output heads, routers, vision, audio); "
        "in a state the masks decide",
    )
    parser.add_argument("--output_json", metavar="FILE", help="file for the table")
    args = parser.parse_args()
    args.pattern = Pattern.parse(args.require, "--require") if args.require else None
    with reported_as(f"--exclude {args.exclude} is not a regular expression", re.error):
        re.compile(args.exclude or "")
    return args


def print_row(report: MatrixReport, width: int) -> None:
    size = "x".join(map(str, report.shape))
    verdict = "yes" if report.fits else "NO"
    print(
        f"{report.name:<{width}} {size:>13} {report.dtype:>8} {report.zero_share:7.2%} {verdict:>7} "
        f"{report.negative_zeros:6}",
        flush=True,
    )


def print_summary(reports: list[MatrixReport]) -> None:
    from sparsity.inspection import zero_totals

    elements, zeros = zero_totals(reports)
    count = sum(report.fits for report in reports)
    negative = sum(report.negative_zeros for report in reports)
    pattern = reports[0].pattern
    zero_line = f"{zeros / elements:.2%} of their {elements:,} weights are zero"
    print(f"\n{count} of {len(reports)} matrices are {pattern}; {zero_line}")
    if count < len(reports):
        dense, _ = zero_totals(report for report in reports if not report.fits)
        print(f"not {pattern}: {dense / elements:.0%} of the weights")
    print(f"{negative} zeros are -0.0")


def main() -> None:
    args = parse_args()

    from sparsity.inspection import DENSE_BY_DESIGN, inspect_path, is_state, unmasked, zero_totals

    if args.output_json:
        prepare_output_dir(Path(args.output_json).parent)
    reports: list[MatrixReport] = []
    width = 44  # of the names
    print(f"{'matrix':<{width}} {'shape':>13} {'dtype':>8} {'zeros':>7} {'pattern':>7} {'-0.0':>6}")
    for report in inspect_path(args.path, args.exclude or DENSE_BY_DESIGN, args.pattern):
        reports.append(report)
        print_row(report, width)
    print_summary(reports)
    if is_state(args.path) and (dense := unmasked(args.path)):
        share = sum(dense.values()) / (sum(dense.values()) + zero_totals(reports)[0])
        print(f"dense, without a mask: {len(dense)} matrices, {share:.0%} of the weights ({few(list(dense))})")
    if args.output_json:
        save_json([dataclasses.asdict(report) for report in reports], args.output_json)
    failed = [report.name for report in reports if not report.fits]
    if args.require and failed:
        raise UserError(f"{len(failed)} of {len(reports)} matrices are not {args.require}, the first is {failed[0]}")


if __name__ == "__main__":
    run_cli(main)
