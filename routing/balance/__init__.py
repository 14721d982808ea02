"""What keeps the experts' load even: the balancers, and the counts that they share."""
