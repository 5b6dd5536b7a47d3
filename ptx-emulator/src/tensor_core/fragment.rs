//! Fragments: which row and column of a matrix each value in a lane's registers is.
//!
//! A fragment of 16-bit elements is made of 8 x 8 matrices, with one register of each lane for each
//! matrix. The register holds two neighbours of a row, the left one in its low half. The lanes are:
//!
//! ```text
//! column    0  1    2  3    4  5    6  7
//! row 0     0  0    1  1    2  2    3  3
//! row 1     4  4    5  5    6  6    7  7
//! ...
//! row 7    28 28   29 29   30 30   31 31
//! ```
//!
//! Matrix A has 16 rows and 16 of k: four such matrices. These are the registers of a lane:
//!
//! ```text
//!              k 0 to 7    k 8 to 15
//! row 0 to 7      0            2
//! row 8 to 15     1            3
//! ```
//!
//! With 8-bit elements a register holds four neighbours of a row, and matrix A has 32 of k: twice
//! as many as above in each column of the table.
//!
//! Matrix B has 16 of k and 8 columns: two matrices, one for each half of k. They are transposed:
//! a row of the picture is a column of B, and a register holds two neighbours in k.
//!
//! Accumulators have 16 rows and N columns. They lie in the same lanes, but each f32 fills a
//! register, so that there are two registers where a 16-bit matrix has one:
//!
//! ```text
//!              column 0 to 7    column 8 to 15    ...
//! row 0 to 7       0  1             4  5
//! row 8 to 15      2  3             6  7
//! ```

/// The row and column, in an 8 x 8 matrix, of the low half (0) or high half (1) of a register.
#[inline(always)]
pub(crate) fn of_8x8(lane: usize, half: usize) -> (usize, usize) {
    (lane / 4, 2 * (lane % 4) + half)
}

/// The row and k, in matrix A, of an element in one of a lane's four registers. A register holds
/// two or four elements.
#[inline(always)]
pub(crate) fn of_a(lane: usize, register: usize, i: usize, per_register: usize) -> (usize, usize) {
    (lane / 4 + 8 * (register % 2), per_register * (lane % 4 + 4 * (register / 2)) + i)
}

/// The k and the column, in matrix B, of a half of one of a lane's two registers.
#[inline(always)]
pub(crate) fn of_b(lane: usize, register: usize, half: usize) -> (usize, usize) {
    let (column, k) = of_8x8(lane, half);
    (k + 8 * register, column)
}

/// The lane and the register that hold the accumulator of a row and a column.
#[inline(always)]
pub(crate) fn accumulator(row: usize, column: usize) -> (usize, usize) {
    (row % 8 * 4 + column % 8 / 2, column / 8 * 4 + row / 8 * 2 + column % 2)
}

/// The place of a column among eight in the order 0, 2, 4, 6, 1, 3, 5, 7. Four neighbouring lanes
/// hold eight columns of a row in this order: one register the even ones, the next the odd ones.
#[inline(always)]
pub(crate) fn even_before_odd(column: usize) -> usize {
    column % 2 * 4 + column / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_element_of_a_has_one_place() {
        for count in [2, 4] {
            let of_lane = |lane| (0..4 * count).map(move |i| of_a(lane, i / count, i % count, count));
            let all: BTreeSet<_> = (0..16).flat_map(|row| (0..8 * count).map(move |k| (row, k))).collect();
            assert_eq!((0..32).flat_map(of_lane).collect::<BTreeSet<_>>(), all);
        }
    }

    #[test]
    fn each_element_of_b_has_one_place() {
        let places = (0..32).flat_map(|lane| (0..4).map(move |i| of_b(lane, i / 2, i % 2)));
        let all: BTreeSet<_> = (0..16).flat_map(|k| (0..8).map(move |column| (k, column))).collect();
        assert_eq!(places.collect::<BTreeSet<_>>(), all);
    }

    #[test]
    fn accumulators_lie_in_the_lanes_of_8x8_matrices() {
        let mut places = BTreeSet::new();
        for (row, column) in (0..16).flat_map(|row| (0..24).map(move |column| (row, column))) {
            let (lane, register) = accumulator(row, column);
            assert_eq!(of_8x8(lane, register % 2), (row % 8, column % 8));
            assert!(lane < 32 && register < 12 && places.insert((lane, register)), "{row}, {column}");
        }
    }

    #[test]
    fn four_lanes_hold_eight_columns_in_two_registers() {
        for column in 0..8 {
            let (place, first) = (even_before_odd(column), accumulator(5, 0));
            assert_eq!(accumulator(5, column), (first.0 + place % 4, first.1 + place / 4));
        }
    }
}
