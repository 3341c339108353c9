//! The north face: all that containerd speaks, and the composition root kuasard.
