"""The estimators of this package, and the protocol that all estimators share."""
