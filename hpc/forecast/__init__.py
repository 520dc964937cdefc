"""How long a job takes: step costs measured on the device, and a simulation fed with them."""
