"""Networks and their mathematics; knows no config object and no Trainer."""
