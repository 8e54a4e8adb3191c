"""Training and validation of classifiers, built on the pieces of timm."""
