"""What a program costs.

    compile_program     compile time, XLA's counts of operations and bytes, memory
    product_flops       operations of matrix products and convolutions, counted in the program as written
    time_interleaved    times of several programs that can be compared
    matmul_peak         what utilisation is measured against

Imported explicitly (`from mf_eqx import measure`).
"""

from ._program import (
    compile_program as compile_program,
    Cost as Cost,
    product_flops as product_flops,
    Program as Program,
)
from ._timing import matmul_peak as matmul_peak, time_interleaved as time_interleaved, Times as Times
