"""Construction of counterfactual groups from captions and pictures. Edits are proposed, applied, verified and selected, and the groups can
be audited. Every candidate is recorded with its history.

The back ends that propose and apply edits are interchangeable. A user's script can add one with ``PROPOSERS["my_rules"] = ...``
(cfvlm_ds/counterfactuals/propose) or ``EDITORS["my_editor"] = ...`` (cfvlm_ds/counterfactuals/edit).
"""
