"""The paper's supervised fine-tuning in small (section 2.2): a procedural world, and later the recipe over it.

Nothing of the runtime imports this package.
"""
