"""Tasks in the style of RULER, generated for a model's own context length: what a policy costs in answers."""
