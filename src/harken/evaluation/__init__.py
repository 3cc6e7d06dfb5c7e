"""From a similarity matrix to a number that can be compared: metrics, protocols, significance, passports, tables."""
