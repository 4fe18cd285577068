"""What the kinds that Kubernetes does not know of itself look like: the fields that we use, and no others.

Written by hand, and compared with the definitions of each project (which versions: deploy/README.md). A field
that is not here is refused: a cluster would drop it in silence.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
GROUP: Schema = {
    "type": "string",
    "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
PROMETHEUS_TIME: Schema = {  # the largest unit first, each once
    "type": "string",
    "minLength": 1,
    "pattern": "^(0|" + "".join(f"([0-9]+{unit})?" for unit in ("y", "w", "d", "h", "m", "s", "ms")) + ")$",
}
GATEWAY_TIME: Schema = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
POD_TEMPLATE: Schema = {"type": "object", "required": ["spec"]}  # judged as a Pod by itself


def fields(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these fields and no others."""
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def many(item: Schema, least: int = 1, most: int = 1000) -> Schema:
    """A list of such items."""
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def kind(api_version: str, name: str, spec: Schema) -> Schema:
    """A whole object of this kind."""
    return fields(
        {
            "apiVersion": {"const": api_version},
            "kind": {"const": name},
            "metadata": fields({"name": NAME}, {"labels": TEXTS, "annotations": TEXTS, "namespace": NAME}),
            "spec": spec,
        }
    )


_RAY_SERVICE = fields(
    {
        "serveConfigV2": TEXT,
        "rayClusterConfig": fields(
            {
                "rayVersion": TEXT,
                "headGroupSpec": fields({"rayStartParams": TEXTS, "template": POD_TEMPLATE}),
                "workerGroupSpecs": many(
                    fields(
                        {
                            "groupName": TEXT,
                            "minReplicas": COUNT,
                            "maxReplicas": COUNT,
                            "rayStartParams": TEXTS,
                            "template": POD_TEMPLATE,
                        },
                        {"replicas": COUNT},
                    )
                ),
            }
        ),
    }
)
_POD_MONITOR = fields(
    {
        "selector": fields({"matchLabels": TEXTS}),
        "podMetricsEndpoints": many(
            fields({"port": TEXT}, {"path": {"type": "string", "pattern": "^/"}, "interval": PROMETHEUS_TIME})
        ),
    }
)
_RULE = fields({"alert": TEXT, "expr": TEXT}, {"for": PROMETHEUS_TIME, "labels": TEXTS, "annotations": TEXTS})
_PROMETHEUS_RULE = fields({"groups": many(fields({"name": TEXT, "rules": many(_RULE)}))})
_INFERENCE_POOL = fields(
    {
        "selector": fields({"matchLabels": TEXTS}),
        "targetPorts": many(fields({"number": PORT}), most=8),
        "endpointPickerRef": fields(
            {"name": NAME, "port": fields({"number": PORT})},
            {"failureMode": {"enum": ["FailOpen", "FailClose"]}, "group": GROUP, "kind": TEXT},
        ),
    }
)
_HTTP_ROUTE = fields(
    {
        "parentRefs": many(fields({"name": NAME}, {"namespace": NAME}), most=32),
        "rules": many(
            fields(
                {
                    "matches": many(
                        fields(
                            {
                                "path": fields(
                                    {
                                        "type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                                        "value": {"type": "string", "pattern": "^/", "maxLength": 1024},
                                    }
                                )
                            }
                        ),
                        most=64,
                    ),
                    "backendRefs": many(
                        fields({"name": NAME}, {"group": GROUP, "kind": TEXT, "port": PORT}), most=16
                    ),
                },
                {"timeouts": fields({"request": GATEWAY_TIME})},
            ),
            most=16,
        ),
    }
)
_MODEL_REWRITE = fields(
    {
        "poolRef": fields({"name": NAME}, {"group": GROUP, "kind": TEXT}),
        "rules": many(
            fields(
                {
                    "targets": many(
                        fields(
                            {"modelRewrite": TEXT},
                            {"weight": {"type": "integer", "minimum": 1, "maximum": 1000000}},
                        )
                    )
                },
                {"matches": many(fields({"model": fields({"value": TEXT}, {"type": {"enum": ["Exact"]}})}))},
            )
        ),
    }
)

KINDS = {
    "RayService": kind("ray.io/v1", "RayService", _RAY_SERVICE),
    "PodMonitor": kind("monitoring.coreos.com/v1", "PodMonitor", _POD_MONITOR),
    "PrometheusRule": kind("monitoring.coreos.com/v1", "PrometheusRule", _PROMETHEUS_RULE),
    "InferencePool": kind("inference.networking.k8s.io/v1", "InferencePool", _INFERENCE_POOL),
    "HTTPRoute": kind("gateway.networking.k8s.io/v1", "HTTPRoute", _HTTP_ROUTE),
    "InferenceModelRewrite": kind("llm-d.ai/v1alpha2", "InferenceModelRewrite", _MODEL_REWRITE),
}
