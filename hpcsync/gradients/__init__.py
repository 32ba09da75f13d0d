"""From a parameter's gradient to the mean over all ranks: plan, buckets, reducer."""
