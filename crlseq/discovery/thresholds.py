"""From where on something counts; apart from what uses it, since a report names these numbers and needs no torch."""

DESCRIBED = 1.1  # misfit up to which a model describes its moments; where mixing is linear it is 1.00 to 1.03
DECISIVE = 2.0  # standard errors of a held-out gain
DECLARED_SUPPORT = 0.5  # an edge that just passes its likelihood ratio is found in half of the replicates
