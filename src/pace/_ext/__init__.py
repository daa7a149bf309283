"""The compiled kernels. Import `pace.ops`, not this package."""
