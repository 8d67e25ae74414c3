"""How small an edit of a model's weights can hide a backdoor (Garg, Kumar, Goel, Liang, CIKM 2020)."""
