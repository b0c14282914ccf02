"""CPU as a first-class verl platform: the whole real stack runs on a laptop and in CI."""
