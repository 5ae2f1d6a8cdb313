"""Ridge regression, online, behind the interface of scikit-learn."""
