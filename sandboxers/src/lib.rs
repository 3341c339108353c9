//! The contract every sandbox technique implements, and what they share.
