"""The platform: its client, the competition's archive, the notebook and its sessions. Nothing else talks to Kaggle."""
