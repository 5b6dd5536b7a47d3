//! The subcommands, one a file: each has its arguments, and a function of the same name that runs it.

pub mod bench;
pub mod build;
pub mod describe;
pub mod doctor;
pub mod plot;
pub mod run;
pub mod verify;
