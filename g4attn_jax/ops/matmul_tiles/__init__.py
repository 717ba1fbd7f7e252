"""Masked tiles of matrices, for the kernels that multiply them. There is no public function."""
