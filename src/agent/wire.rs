//! What commands and agents say to each other: frames over a Unix socket.
