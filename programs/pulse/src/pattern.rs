//! What every word of the work area must hold.
//!
//! Each generation has its own straight [`Line`]: word `i` holds `start + i * step`, modulo 2^64.
//! A line costs one addition per word, whatever the vector width, and its step is odd, so within one
//! generation no two words are equal: a page in another's place, or shifted, differs in every word.
//! The lines of two generations meet in at most a few words, so a page of an older generation
//! differs in nearly every one. Generation 0 is all zero, which no later line is.

/// First multiplier of the splitmix64 finaliser.
pub(crate) const MIX_FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
/// Second multiplier of the splitmix64 finaliser.
pub(crate) const MIX_SECOND: u64 = 0x94d0_49bb_1331_11eb;

/// The words of one generation: word `i` holds `start + i * step`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// What word 0 would hold.
    pub start: u64,
    /// What each word adds to the one before it.
    pub step: u64,
}

impl Line {
    /// The line of a generation; that of generation 0 is zero everywhere.
    #[must_use]
    pub fn of(generation: u64) -> Self {
        let start = mix(generation);
        let odd = u64::from(generation != 0);
        Self { start, step: mix(start) | odd }
    }

    /// The word with this index, which is its offset in the guest's memory divided by 8.
    #[must_use]
    pub fn word(self, index: u64) -> u64 {
        self.start.wrapping_add(index.wrapping_mul(self.step))
    }
}

/// The splitmix64 finaliser: a bijection that maps 0 to 0.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(MIX_FIRST);
    let value = (value ^ (value >> 27)).wrapping_mul(MIX_SECOND);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE_WORDS: u64 = 512;

    fn page(index: u64, generation: u64) -> Vec<u64> {
        let line = Line::of(generation);
        (0..PAGE_WORDS).map(|word| line.word(index * PAGE_WORDS + word)).collect()
    }

    fn differing(left: &[u64], right: &[u64]) -> usize {
        left.iter().zip(right).filter(|(a, b)| a != b).count()
    }

    #[test]
    fn generation_zero_is_all_zero() {
        assert!(page(12_345, 0).iter().all(|&word| word == 0));
    }

    /// These values are the format: a guest goes on under a later release.
    #[test]
    fn the_first_lines_are_fixed() {
        assert_eq!(Line::of(1), Line { start: 0x5692_161d_100b_05e5, step: 0x7ab4_0e09_0f36_3a7d });
        assert_eq!(Line::of(2).word(0x1234), 0x36b4_1091_8432_b0de);
    }

    proptest! {
        #[test]
        fn a_page_of_another_generation_differs_nearly_everywhere(
            index in 0u64..1 << 24, generation in 0u64..1 << 40, older in 1u64..1000,
        ) {
            prop_assume!(older <= generation);
            let now = page(index, generation);
            prop_assert!(differing(&now, &page(index, generation - older)) >= 500);
        }

        #[test]
        fn two_pages_of_one_generation_differ_in_every_word(
            left in 0u64..1 << 24, right in 0u64..1 << 24, generation in 1u64..1 << 40,
        ) {
            prop_assume!(left != right);
            prop_assert_eq!(differing(&page(left, generation), &page(right, generation)), 512);
        }

        #[test]
        fn a_shifted_page_differs_in_every_word(
            index in 0u64..1 << 24, generation in 1u64..1 << 40, shift in 1usize..512,
        ) {
            let now = page(index, generation);
            prop_assert_eq!(differing(&now[shift..], &now), 512 - shift);
        }
    }
}
