//! A FIX 4.4 acceptor to patch while it runs.
fn main() {}
