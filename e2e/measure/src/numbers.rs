//! Medians, how far they can be trusted, and slopes.
//!
//! Pauses are not normally distributed: a few are much longer than the rest, because the scheduler was elsewhere.
//! So everything here goes by order, not by sums: medians and quartiles, a bound of the median that holds
//! whatever the distribution is, and a slope that a few outliers do not move.

use serde::Serialize;

/// How sure a bound is meant to be.
const CONFIDENCE: f64 = 0.95;
/// Samples drawn to see how much a slope varies.
const RESAMPLES: u64 = 2000;

/// How values are spread.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// How many there are.
    pub count: usize,
    /// The smallest.
    pub min: f64,
    /// A quarter are below it.
    pub lower_quartile: f64,
    /// Half are below it.
    pub median: f64,
    /// Three quarters are below it.
    pub upper_quartile: f64,
    /// Nine tenths are below it.
    pub p90: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of these values; `None` of none.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        Some(Self {
            count: sorted.len(),
            min: *sorted.first()?,
            lower_quartile: quantile(&sorted, 0.25)?,
            median: quantile(&sorted, 0.5)?,
            upper_quartile: quantile(&sorted, 0.75)?,
            p90: quantile(&sorted, 0.9)?,
            max: *sorted.last()?,
        })
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// The value below which that part of the sorted values lies, between two of them in proportion.
fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let place = part * float(sorted.len().checked_sub(1)?);
    let below = sorted.get(floor(place))?;
    let above = sorted.get(floor(place) + 1).unwrap_or(below);
    Some(below + (above - below) * place.fract())
}

/// The median; `None` of no values.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(&sorted(values), 0.5)
}

/// What the true median lies below, with a confidence of at least 95 %, whatever the values' distribution; `None` if
/// there are fewer than five, which cannot say.
///
/// Of n values, the k-th smallest lies below the true median only if fewer than n - k + 1 of them lie above it. How many
/// do is a matter of n tosses of a coin: so the bound is the smallest k-th value for which the coin says 95 %.
#[must_use]
pub fn median_upper_bound(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    let count = i32::try_from(sorted.len()).ok()?;
    // The chance of exactly k heads in `count` tosses, from k = 0 on, added up.
    let mut chance = 0.5_f64.powi(count);
    let mut below = 0.0;
    for (heads, value) in (0..count).zip(&sorted) {
        below += chance;
        if below >= CONFIDENCE {
            return Some(*value);
        }
        chance *= f64::from(count - heads) / f64::from(heads + 1);
    }
    None
}

/// What the true median lies above, likewise.
#[must_use]
pub fn median_lower_bound(values: &[f64]) -> Option<f64> {
    let mirrored: Vec<f64> = values.iter().map(|value| -value).collect();
    median_upper_bound(&mirrored).map(|bound| -bound)
}

/// How a value grows with another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Slope {
    /// The slope.
    pub slope: f64,
    /// It lies above this, with a confidence of 97.5 %.
    pub low: f64,
    /// It lies below this, with a confidence of 97.5 %.
    pub high: f64,
}

/// Values that were all measured at one place.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// The place.
    pub at: f64,
    /// The values.
    pub values: Vec<f64>,
}

impl Slope {
    /// The median of the slopes between any two values of different groups, each weighted by how far the two places are
    /// apart (weighted Theil-Sen). How far to trust it is told by drawing as many values again from each group, with
    /// repetition, 2000 times (bootstrap; the numbers are the same in every run). `None` if there are not two groups.
    #[must_use]
    pub fn of(groups: &[Group]) -> Option<Self> {
        let slope = slope_between(groups)?;
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        let draw = |group: &Group, numbers: &mut Numbers| Group {
            at: group.at,
            values: group.values.iter().filter_map(|_| numbers.one_of(&group.values)).collect(),
        };
        let slopes: Vec<f64> = (0..RESAMPLES)
            .filter_map(|_| {
                slope_between(&groups.iter().map(|group| draw(group, &mut numbers)).collect::<Vec<_>>())
            })
            .collect();
        let slopes = sorted(&slopes);
        Some(Self { slope, low: quantile(&slopes, 0.025)?, high: quantile(&slopes, 0.975)? })
    }
}

fn slope_between(groups: &[Group]) -> Option<f64> {
    let mut slopes: Vec<(f64, f64)> = Vec::new();
    for (number, one) in groups.iter().enumerate() {
        for other in groups.iter().skip(number + 1).filter(|other| other.at != one.at) {
            let apart = other.at - one.at;
            let pairs = one.values.iter().flat_map(|from| other.values.iter().map(move |to| to - from));
            slopes.extend(pairs.map(|rise| (rise / apart, apart.abs())));
        }
    }
    slopes.sort_unstable_by(|one, other| one.0.total_cmp(&other.0));
    let half = slopes.iter().map(|(_, weight)| weight).sum::<f64>() / 2.0;
    let mut below = 0.0;
    slopes.iter().find_map(|(slope, weight)| {
        below += weight;
        (below >= half).then_some(*slope)
    })
}

/// Numbers that look random and are the same in every run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn one_of(&mut self, values: &[f64]) -> Option<f64> {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let count = u64::try_from(values.len()).ok().filter(|count| *count > 0)?;
        values.get(usize::try_from(self.0 % count).ok()?).copied()
    }
}

#[expect(clippy::cast_precision_loss, reason = "a count of values is far below 2^52")]
fn float(count: usize) -> f64 {
    count as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a place in a list: not negative, far below 2^52, and rounded down on purpose"
)]
fn floor(place: f64) -> usize {
    place as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one_to(count: u32) -> Vec<f64> {
        (1..=count).rev().map(f64::from).collect()
    }

    #[test]
    fn a_spread_is_told_by_order() {
        let spread = Spread::of(&one_to(101)).unwrap();
        assert_eq!((spread.count, spread.min, spread.max), (101, 1.0, 101.0));
        assert_eq!((spread.lower_quartile, spread.median, spread.upper_quartile), (26.0, 51.0, 76.0));
        assert_eq!(spread.p90, 91.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 8.0]), Some(3.0));
        assert!(Spread::of(&[]).is_none() && median(&[]).is_none());
    }

    #[test]
    fn the_bound_of_a_median_is_the_one_in_the_tables() {
        // One-sided sign test at 5 %: the rank is n + 1 less the tables' critical value.
        for (count, rank) in [(5, 5.0), (8, 7.0), (10, 9.0), (20, 15.0), (40, 26.0), (100, 59.0)] {
            assert_eq!(median_upper_bound(&one_to(count)), Some(rank), "of {count}");
            assert_eq!(median_lower_bound(&one_to(count)), Some(f64::from(count) + 1.0 - rank), "of {count}");
        }
        assert_eq!((median_upper_bound(&one_to(4)), median_lower_bound(&one_to(4))), (None, None));
    }

    #[test]
    fn a_slope_is_found_among_outliers_and_none_where_none_is() {
        let group = |at: f64, slope: f64| {
            let noise = [-3.0, -1.0, 0.0, 0.5, 1.5, 2.0, 900.0];
            Group { at, values: noise.iter().map(|noise| 100.0 + slope * at + noise).collect() }
        };
        let rising = Slope::of(&[group(0.0625, 20.0), group(1.0, 20.0), group(8.0, 20.0)]).unwrap();
        assert!((rising.slope - 20.0).abs() < 0.5, "{rising:?}");
        assert!(rising.low > 10.0, "{rising:?}");
        let level = Slope::of(&[group(0.0625, 0.0), group(1.0, 0.0), group(8.0, 0.0)]).unwrap();
        assert!(level.low <= 0.0 && level.high >= 0.0 && level.slope.abs() < 0.5, "{level:?}");
        assert_eq!(Slope::of(&[group(1.0, 0.0)]), None);
    }

    proptest! {
        #[test]
        fn order_and_shift_change_nothing_but_the_shift(
            mut values in proptest::collection::vec(-1e6..1e6_f64, 5..60), shift in -1e6..1e6_f64
        ) {
            let shifted: Vec<f64> = values.iter().map(|value| value + shift).collect();
            let (here, there) = (median(&values).unwrap(), median(&shifted).unwrap());
            prop_assert!((here + shift - there).abs() < 1e-6);
            let bound = median_upper_bound(&values).unwrap();
            prop_assert!(bound >= here - 1e-9);
            values.reverse();
            prop_assert_eq!(median_upper_bound(&values), Some(bound));
        }
    }
}
