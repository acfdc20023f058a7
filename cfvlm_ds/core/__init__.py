"""Shared types: groups, score matrices, options, ranks, files and errors. All other folders import this one."""
