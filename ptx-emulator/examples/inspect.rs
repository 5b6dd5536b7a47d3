//! Parses PTX files with the emulator and prints their entries: a quick check that everything in
//! them is known.

fn main() {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        let started = std::time::Instant::now();
        let module = std::fs::read_to_string(&path)
            .map_err(|error| error.to_string())
            .and_then(|text| ptx_emulator::Module::parse(&path, &text).map_err(|error| error.to_string()));
        match module {
            Ok(module) => println!("{path}: {:?} in {:?}", module.entries().collect::<Vec<_>>(), started.elapsed()),
            Err(error) => {
                failed = true;
                println!("{error}");
            }
        }
    }
    std::process::exit(failed as i32);
}
