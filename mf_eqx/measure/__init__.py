"""The cost of programs.

    compile_program     compile time, XLA's counts of operations and bytes, memory
    relative_cost       what a step of an objective costs in units of Flow Matching's
    product_flops       operations of matrix products and convolutions, counted in the program as written
    time_interleaved    comparable times of several programs
    matmul_peak         the rate of matrix products that utilisation is relative to

This module is imported explicitly (`from mf_eqx import measure`).
"""

from ._program import (
    compile_program as compile_program,
    Cost as Cost,
    product_flops as product_flops,
    Program as Program,
)
from ._relative_cost import relative_cost as relative_cost
from ._timing import matmul_peak as matmul_peak, time_interleaved as time_interleaved, Times as Times
