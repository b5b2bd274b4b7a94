"""AnnData in, tensors out: labels, values, splits and batches."""
