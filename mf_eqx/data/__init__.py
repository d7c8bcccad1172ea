"""Data on its way in: what comes from outside is checked on the host, where it enters.

Inside a jitted step nothing can be refused: a label out of range reads some row of the table, a NaN spoils everything.
"""

from ._check import check_rows as check_rows
