"""The types that all other folders use: groups, score matrices, options, ranks, files, errors."""
