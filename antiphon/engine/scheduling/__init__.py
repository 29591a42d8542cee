"""What a rank runs next: requests and the scheduler that batches them."""
