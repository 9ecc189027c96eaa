"""The rules of the normal form, in named sets: tables of rows, pattern -> replacement, and a few functions."""

from turbocompile.rewrite.rules.arithmetic import ARITHMETIC
from turbocompile.rewrite.rules.casts import CASTS
from turbocompile.rewrite.rules.complex_pairs import COMPLEX_PAIRS
from turbocompile.rewrite.rules.layout import INWARDS, LAYOUT
from turbocompile.rewrite.rules.narrows import NARROWS
from turbocompile.rewrite.rules.products import PRODUCTS
from turbocompile.rewrite.rules.reductions import REDUCTIONS

# The rules of one operator are tried in this order.
NORMAL_FORM = CASTS + LAYOUT + NARROWS + INWARDS + ARITHMETIC + REDUCTIONS + PRODUCTS + COMPLEX_PAIRS
