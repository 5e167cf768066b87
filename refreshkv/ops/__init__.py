"""The operations of the refresh pattern: tensors and numbers in, tensors out."""
