"""What a step of training takes of a device, measured before anything is trained."""
