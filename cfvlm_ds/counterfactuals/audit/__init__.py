"""Auditing: what a model could learn from a set of groups without looking, and what of it is elsewhere too."""
