"""Which training images do not belong to their class: an adversarial autoencoder, and what it is compared with.

Beggel, Pfeiffer, Bischl: Robust Anomaly Detection in Images using Adversarial Autoencoders, ECML PKDD 2019.
"""
