"""What is done to training images, keyed by sample: crops, mirroring, mixing, RandAugment, erasing."""
