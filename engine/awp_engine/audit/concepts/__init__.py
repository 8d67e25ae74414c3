"""Which concepts a classifier's decision leans on: RCAV (Pfau et al., Robust Semantic Interpretability, 2021)."""
