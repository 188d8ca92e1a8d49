// linear by pairs of thread blocks: how a tile is cut, and the instructions for clusters and the matrix unit.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>

#include <utility>

#include "quamba/cluster.cuh"
#include "quamba/matrix_operand.cuh"

namespace quamba {

constexpr int kPairStage = 128;  // bytes of K of a stage: a row of the widest swizzle
constexpr int kPairGroups = 2, kPairGroupThreads = 128;
constexpr int kPairWorkers = kPairGroups * kPairGroupThreads;
constexpr int kPairSides = kPairGroupThreads - 32;  // threads beside the warp that copies
constexpr int kPairThreads = kPairWorkers + kPairGroupThreads;  // registers are dealt out by groups

// kHalves: each block of a pair has half of K. kQuads: and two such pairs, a cluster, get the weight by one read, for
// different rows. kRows: of a tile, half of them a group's.
template <int ROWS, int COLUMNS, bool HALVES, typename OUT, bool QUADS = false>
struct PairTile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS;
  static constexpr bool kQuads = QUADS, kShares = !HALVES || QUADS;  // what a block copies goes to two
  static constexpr int kCluster = QUADS ? 4 : 2;
  static constexpr bool kHalves = HALVES, kBytes = sizeof(OUT) == 1;
  using Out = OUT;
  static constexpr int kDeep = kRows / 128;      // products of 64 rows, a group's
  static constexpr int kSums = kColumns / 2;     // of a thread, of 64 rows
  static constexpr int kRun = kBytes ? 32 : 16;  // columns that four threads deal out among each other
  static constexpr int kRuns = kColumns / kRun;  // of a tile
  static constexpr int kOwn = kHalves ? (kRuns + 1) / 2 : kRuns;  // that a block finishes; of an odd number, both one
  static constexpr int kBox = kQuads ? (kRuns + 1) / 2 : kRuns;   // that it copies; likewise
  static constexpr int kStage = (kRows + kColumns) * kPairStage;
  static constexpr int kCopied = (kRows + (kQuads ? 2 * kBox * kRun : kColumns)) * kPairStage;  // bytes that arrive
  static constexpr int kHanded = kHalves ? kRows * kOwn * kRun * 4 : 0;  // bytes that the other block sends
  static constexpr int kScales = (kBytes ? 12 : 4) * kColumns;
  static constexpr int kMany = kDeep * kSums > 160 ? 232 : 224;  // registers of a thread that multiplies
  static constexpr int kFew = 3 * 168 - 2 * kMany;               // of another
  static constexpr int kLate = 3;  // stages from which on the residual is asked for
  static constexpr int kFixed = 1024 + kHanded + kScales + 256;
  static constexpr int kStages = (227 * 1024 - kFixed) / kStage < 8 ? (227 * 1024 - kFixed) / kStage : 8;
  static constexpr int kShared = kFixed + kStages * kStage;
  static_assert(kRows % 128 == 0 && kColumns % kRun == 0 && kStages >= 3, "whole runs");
  static_assert(!(kHalves && kDeep > 1) && !(kHalves && kBytes), "sums are handed over by 64 rows");
  static_assert(kHalves || !kQuads, "quads are pairs of halves");
};

}  // namespace quamba
