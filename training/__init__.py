"""Training: recipes for every member, data mixtures, and how the bundled checkpoint was made."""
