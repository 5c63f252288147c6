//! livepatch
