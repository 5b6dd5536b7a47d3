//! The subcommands, one a file. Each file has the arguments, and a function of the subcommand's
//! name that runs it.

pub mod bench;
pub mod build;
pub mod describe;
pub mod doctor;
pub mod plot;
pub mod run;
pub mod study;
pub mod verify;
