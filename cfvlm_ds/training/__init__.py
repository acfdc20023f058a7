"""One run: checked, resumed, trained step by step, evaluated, exported."""
