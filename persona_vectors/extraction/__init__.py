"""From a trait to a vector: rollouts, their difference, its evidence; and new traits."""
