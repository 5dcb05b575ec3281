// Swagger UI on this page. Nothing goes to another host: validatorUrl would name one.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true,
  validatorUrl: null,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  defaultModelRendering: "model",
  defaultModelExpandDepth: 2,
});
