// mixers_step: the shapes that a kernel knows when it is compiled, and which of them a plan has. On the host.
#pragma once

#include <cstring>

#include "quamba/mixers_step.cuh"

namespace quamba {

template <typename... Shapes>
struct StackShapeList {};

// Whether setting what the shape says would change nothing.
template <typename Shape>
bool has_shape(const StackPlan& p) {
  StackPlan q;
  std::memcpy(&q, &p, sizeof q);
  Shape::set(&q);
  return std::memcmp(&q, &p, sizeof q) == 0;
}

// Calls run with the first of the shapes that the plan has, of those with a cluster or without; false where it has
// none.
template <bool CLUSTER, typename Run, typename... Shapes>
bool with_known_shape(StackShapeList<Shapes...>, const StackPlan& p, Run&& run) {
  const auto tried = [&](auto shape) {
    using Shape = decltype(shape);
    if constexpr ((Shape::kCluster > 1) == CLUSTER) {
      if (!has_shape<Shape>(p)) return false;
      run(shape);
      return true;
    }
    return false;
  };
  return (tried(Shapes()) || ...);
}

}  // namespace quamba
