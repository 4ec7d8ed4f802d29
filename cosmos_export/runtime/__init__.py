"""What a program needs from its host at run time. numpy only: no torch, no diffusers."""
