"""Operators: one name, one file; its docstring is the specification.

No function is re-exported here, so that none hides its module.
"""
