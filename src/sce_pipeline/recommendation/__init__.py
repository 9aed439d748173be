"""The best items for whole histories, by a trained model; knows no Kedro and no data frames."""
